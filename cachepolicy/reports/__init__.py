"""What a person sees: text, explanations, comparisons of schedules, and HTML reports."""
