from .cli.app import main

if __name__ == "__main__":  # a process that loads images, started by spawn, imports this file too
    main()
