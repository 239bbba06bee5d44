"""What is proved or computed exactly: laws of tokens, their maps and limits, rates, and laws at finite n."""
