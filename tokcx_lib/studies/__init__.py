"""The measurements behind the chapters, one room a subject; `registry` has every named run, `runs` what runs them."""
