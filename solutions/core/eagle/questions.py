"""Questions to a chat model, made of subjects and forms: what a head is trained on are the model's own answers to them."""

from __future__ import annotations

import random

FORMS = (
    "What is {}?", "Explain {} to a child.", "Write a short story about {}.", "Give me three facts about {}.",
    "Tell me about {}.", "Why does {} matter?", "Write a poem about {}.", "What should a beginner know about {}?",
    "How would you describe {} to a friend?", "What are common mistakes with {}?", "Write a letter to a teacher about {}.",
    "Describe {} step by step.", "What are the advantages and disadvantages of {}?", "Plan a lesson on {}.",
    "Compare {} with something similar.", "What surprised people most about {}?", "How did {} change over time?",
    "Give me some advice about {}.", "Summarize what is known about {}.", "Write a dialogue between two people about {}.",
    "How does {} work?", "Who first studied {}, and when?", "What do people often get wrong about {}?",
    "Write an email to a colleague about {}.", "I want to learn about {}. Where do I start?", "List five words to do with {}.",
    "Write a diary entry about {}.", "What would the world be like without {}?", "Is {} good or bad for us?",
    "Give me a recipe or a plan that has to do with {}.", "Write a newspaper article about {}.", "What is the history of {}?",
    "Which questions should I ask an expert on {}?", "How can a family save money on {}?", "Write three tips on {}.",
    "My son is afraid of {}. What can I do?", "Where can I see {}?", "Describe a day that had to do with {}.",
    "How is {} taught at school?", "What does {} cost, and why?", "Write a song about {}.", "How do scientists study {}?",
    "What is special about {} in other countries?", "Explain the science behind {}.", "Write a speech about {}.",
    "Can you recommend a book about {}?", "How can I talk about {} with my grandmother?", "What happens next with {}?",
    "Invent a game about {}.", "Give an example of {}.", "Write a fairy tale in which {} plays a role.",
    "What skills does one need for {}?", "When did people begin to care about {}?", "Write a product description for {}.",
    "What are the dangers of {}?", "How would you explain {} to somebody from the past?", "Why do some people dislike {}?",
    "What are the most important parts of {}?", "Make a checklist for {}.", "Tell me a joke about {}.",
    "What have {} and music in common?", "Write a short review of {}.", "How can computers help with {}?",
    "What would you ask about {} in a quiz?", "Define {} in one sentence.", "How long does it take to understand {}?",
    "Write a conversation in which a girl asks her father about {}.", "What are the different kinds of {}?",
    "I am tired of {}. What else could I do?", "Write an introduction to an essay about {}.",
)  # fmt: skip
SUBJECTS = (
    "gravity", "photosynthesis", "the moon", "a thunderstorm", "volcanoes", "rivers", "the human heart", "vaccines", "sleep",
    "dreams", "memory", "learning a language", "cooking rice", "baking a cake", "growing tomatoes", "a vegetable garden",
    "bees", "whales", "penguins", "elephants", "dogs", "horses", "spiders", "dinosaurs", "trees", "deserts", "coral reefs",
    "glaciers", "recycling", "solar power", "wind turbines", "electric cars", "bicycles", "trains", "airplanes", "bridges",
    "lighthouses", "castles", "pyramids", "the Roman Empire", "the Silk Road", "the Industrial Revolution", "democracy",
    "money", "taxes", "saving for a house", "insurance", "a job interview", "working from home", "public speaking",
    "friendship", "honesty", "courage", "patience", "a long journey", "moving to a new city", "a rainy day", "autumn", "snow",
    "the ocean", "a mountain hike", "camping", "swimming", "running a marathon", "yoga", "football", "chess", "board games",
    "the violin", "jazz", "painting", "photography", "films", "theatre", "novels", "writing a diary", "libraries", "schools",
    "universities", "teaching", "computers", "the internet", "databases", "sorting a list", "encryption", "robots",
    "artificial intelligence", "mobile phones", "batteries", "magnets", "light", "sound", "atoms", "water", "salt", "glass",
    "paper", "clocks", "maps", "telescopes", "microscopes", "hospitals", "dentists", "a healthy breakfast", "coffee", "tea",
    "chocolate", "bread", "cheese", "soup", "a used car", "cleaning a kitchen", "washing clothes", "a leaking tap",
    "pets in a small flat", "a birthday party", "a wedding speech", "gifts", "neighbours", "the first day at work", "stress",
    "headaches", "probability", "prime numbers", "triangles", "statistics", "negotiation", "marketing", "a small business",
    "farming", "weather", "climate change", "rain forests", "stars", "black holes", "Mars", "space travel", "ancient Egypt",
    "the Olympic Games", "a cup of tea", "shadows",
    "kindness",
    "electricity", "knives", "gardens in winter", "a good night's rest", "train stations",
    "an old house", "the stock market", "fashion", "shoes", "voting", "the law", "philosophy", "a lost key", "islands",
    "earthquakes", "rainbows", "oil", "gold", "iron", "wood", "silk", "cotton", "rice fields", "markets", "museums",
    "video games", "cartoons", "radio", "newspapers", "postcards", "languages", "grammar", "spelling", "handwriting",
    "percentages", "fractions", "angles", "algorithms", "passwords", "spreadsheets", "search engines", "satellites",
)  # fmt: skip
KEPT_BACK = (
    "Tell me a short story about a lighthouse keeper.", "Explain to a child why the sky is blue.",
    "Write a letter to a friend about your first week in a new town.", "What should I think of when I buy a used bicycle?",
    "Describe how bread is made, step by step.", "Why do cats purr?", "Give me three reasons to learn a musical instrument.",
    "What is the difference between a virus and a bacterium?", "Plan a weekend in the mountains for two people.",
    "How does a refrigerator keep food cold?", "Write a poem about the sea in autumn.", "Who invented the printing press?",
    "What makes a good teacher?", "Explain what an operating system does.", "How do I get a coffee stain out of a shirt?",
    "Tell me something surprising about octopuses.",
)  # fmt: skip
"""Questions of other forms, that no head is trained on: drafts are measured on answers to them."""


def make_questions(count: int, seed: int) -> list[str]:
    """So many questions, none twice before all have been asked."""
    every = [form.format(subject) for subject in SUBJECTS for form in FORMS]
    random.Random(seed).shuffle(every)
    return [every[index % len(every)] for index in range(count)]
