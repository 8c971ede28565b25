//! The fuzzer's bytes as a list of choices, read from the first to the last. A choice that
//! changes leaves those before it as they are, and inputs can be written by hand.

/// The bytes that are left.
#[derive(Debug)]
pub struct Input<'a>(&'a [u8]);

impl<'a> Input<'a> {
    /// All bytes of an input.
    pub fn new(bytes: &'a [u8]) -> Self {
        Self(bytes)
    }

    /// Whether nothing is left. What is chosen then is 0.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// A byte.
    pub fn byte(&mut self) -> u8 {
        self.array::<1>()[0]
    }

    /// A coin.
    pub fn coin(&mut self) -> bool {
        self.byte() & 1 != 0
    }

    /// 16 bits, little-endian.
    pub fn word(&mut self) -> u16 {
        u16::from_le_bytes(self.array())
    }

    /// 32 bits, little-endian.
    pub fn double(&mut self) -> u32 {
        u32::from_le_bytes(self.array())
    }

    /// 64 bits, little-endian.
    pub fn quad(&mut self) -> u64 {
        u64::from_le_bytes(self.array())
    }

    /// A number below `end`, which is at most 256, by one byte.
    pub fn below(&mut self, end: u64) -> u64 {
        u64::from(self.byte()) % end
    }

    /// One of these, at most 256.
    pub fn pick<T: Copy>(&mut self, choices: &[T]) -> T {
        choices[self.below(choices.len() as u64) as usize]
    }

    /// Up to `most` bytes: one says how many.
    pub fn bytes(&mut self, most: usize) -> &'a [u8] {
        let len = usize::from(self.byte()).min(most).min(self.0.len());
        let (bytes, rest) = self.0.split_at(len);
        self.0 = rest;
        bytes
    }

    /// A field as an attacker would choose it: small, around a base, near a limit, or anything.
    pub fn field(&mut self, base: u64) -> u64 {
        match self.byte() % 8 {
            0 => u64::from(self.byte()),
            1 => base.wrapping_add(u64::from(self.word())),
            2 => base.wrapping_add(u64::from(self.word()) << 12),
            3 => u64::from(self.word()) << 12,
            4 => 1_u64.checked_shl(u32::from(self.byte())).unwrap_or(0),
            5 => u64::MAX - u64::from(self.word()),
            6 => u64::from(self.double()),
            _ => self.quad(),
        }
    }

    /// The next `N` bytes; zeros where there are no more.
    fn array<const N: usize>(&mut self) -> [u8; N] {
        let mut bytes = [0; N];
        let len = N.min(self.0.len());
        let (taken, rest) = self.0.split_at(len);
        bytes[..len].copy_from_slice(taken);
        self.0 = rest;
        bytes
    }
}
