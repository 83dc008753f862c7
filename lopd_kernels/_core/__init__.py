"""The mathematics, the schedules and the memory model; independent of the implementations."""
