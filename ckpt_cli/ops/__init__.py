"""What a user can ask: one file a question or an edit. They return results or plans and never print."""
