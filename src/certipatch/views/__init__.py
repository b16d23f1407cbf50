"""The one place where a network sees masked images, and how it runs fast there."""
