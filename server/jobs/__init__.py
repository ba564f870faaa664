"""Jobs: programs and long work that workers run.

The record in MongoDB is the truth, the message in Redis only its delivery. A worker claims an attempt by a
conditional write on the record, and only the holder of that claim may write the outcome.
"""
