"""`nvmm report RUN_DIR`: write a run's report.html."""

from nvmm.report.page import main

if __name__ == "__main__":
    main()
