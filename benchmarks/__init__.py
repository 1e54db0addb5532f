"""Measurements of tokcore beside what users have today: see report.py."""
