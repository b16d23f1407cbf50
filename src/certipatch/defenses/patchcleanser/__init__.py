"""PatchCleanser: double masking and challenger masking, with a certificate."""
