"""What a chain leaves is used: a chat, answers to a file of questions, a server."""
