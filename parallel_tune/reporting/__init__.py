"""Pictures and pages of runs: report.html of one, compare.html and compare.png of several. Needs neither torch nor a
network; matplotlib only for the PNG."""
