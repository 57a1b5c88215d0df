"""Grades a learner's checkout: the course's tests and measurements, each in a closed room, on the learner's files alone."""
