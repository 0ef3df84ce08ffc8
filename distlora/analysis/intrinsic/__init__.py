"""How many dimensions fine-tuning needs: `distlora analyze intrinsic`; see README.md beside this file."""
