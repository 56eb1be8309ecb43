"""What is chosen, as pure values: schemes, backends, schedules."""
