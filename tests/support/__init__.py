"""What several test files share: tiny models, prompts, oracles, comparisons. No test is collected here."""
