"""`python -m distlora.packed PACK`: the worker."""

from distlora.packed.worker import main

if __name__ == "__main__":
    main()
