"""Programs that mutate, cut and kill at random; tests run a few rounds of each."""
