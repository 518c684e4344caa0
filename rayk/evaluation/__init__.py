"""Evaluation of students and teachers on held-out rows."""
