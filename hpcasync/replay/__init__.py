"""What a recorded run gives: its replay in one process, the comparison of two runs, a timeline."""
