"""Open tasks: what learners think up themselves, judged by measures and ranked on a scoreboard."""
