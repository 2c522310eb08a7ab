"""Tables that others have measured, read into the columns of `apex_opt.profiles.schema`."""
