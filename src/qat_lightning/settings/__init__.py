"""Settings as plain values: schemes, backends, schedules."""
