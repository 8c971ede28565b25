//! The demo (being built).
