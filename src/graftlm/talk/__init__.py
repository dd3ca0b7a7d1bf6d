"""Who answers: generating, the terminal, files of prompts."""
