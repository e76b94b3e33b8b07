"""`python -m nvmm COMMAND`, what the console command `nvmm COMMAND` is."""

from nvmm.commands.main import main

if __name__ == "__main__":
    main()
