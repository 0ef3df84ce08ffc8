"""`python -m distlora.training.multi_trial PACK`: the worker."""

from distlora.training.multi_trial.worker import main

if __name__ == "__main__":
    main()
