//! What was honoured only in part.
