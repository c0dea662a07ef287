"""The durable record of conversations: sessions, messages, turns, memories, stats."""
