"""The course's own tools: what runs the stages' tests, explains their results, and helps a learner along."""
