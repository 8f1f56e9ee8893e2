"""The grader. An answer is taken out of a notebook (submission), put into a fresh master (graded), and run as untrusted code (sandbox, worker,
confine, syscalls, meter; values travel by wire and objects); nbval runs the checks (grade, nbval_points), and pages and tables are made (report)."""
