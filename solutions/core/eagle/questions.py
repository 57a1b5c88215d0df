"""Questions that drafts are measured on. A head learns from answers to questions that its model asks, none of which is here."""

KEPT_BACK = (
    "Tell me a short story about a lighthouse keeper.", "Explain to a child why the sky is blue.",
    "Write a letter to a friend about your first week in a new town.", "What should I think of when I buy a used bicycle?",
    "Describe how bread is made, step by step.", "Why do cats purr?", "Give me three reasons to learn a musical instrument.",
    "What is the difference between a virus and a bacterium?", "Plan a weekend in the mountains for two people.",
    "How does a refrigerator keep food cold?", "Write a poem about the sea in autumn.", "Who invented the printing press?",
    "What makes a good teacher?", "Explain what an operating system does.", "How do I get a coffee stain out of a shirt?",
    "Tell me something surprising about octopuses.",
)  # fmt: skip
