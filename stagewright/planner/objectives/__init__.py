"""What a plan is to be best at: every objective as a reduction to the search for the least step."""
