"""The course's own code, in three rooms: `tools` for learners, `fixtures` for the stages' tests, `grading` for instructors."""
