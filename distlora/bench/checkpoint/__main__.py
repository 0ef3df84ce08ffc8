"""The process that `distlora bench checkpoint` becomes."""

from distlora.bench.checkpoint.compare import main

if __name__ == "__main__":
    main()
