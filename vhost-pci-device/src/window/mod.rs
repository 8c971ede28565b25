//! The dynamic window: one reserved address range in which apertures of fixed access show
//! ranges of files, and rest where there is nothing to show.
//!
//! | file | what it holds |
//! |---|---|
//! | [`layout`] | which apertures there are, and what is mapped where; decides, touches nothing |
//! | [`aperture`] | carries it out |
//! | [`mod@file`] | which files may be shown |

pub mod aperture;
pub mod file;
pub mod layout;

pub use self::aperture::Window;
pub use self::layout::{Apertures, Refusal, Request};
