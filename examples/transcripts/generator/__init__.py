"""The parts of make_cases.py."""
