"""What happens to runs, and to a person's files, when something goes wrong: `make faults`."""
