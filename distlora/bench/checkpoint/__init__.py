"""`distlora bench checkpoint`: a save and a resume, ours beside PEFT's, Trainer's and accelerate's."""
