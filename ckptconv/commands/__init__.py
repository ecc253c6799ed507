"""The commands, a file for each kind of question: arguments in, one library call, text or JSON out."""
