"""From a command's words to settings that are checked and planned. Imports no torch."""
