//! Values in CPython's `marshal` format, which every CPython reads without importing anything.
//!
//! Only what is written alike since version 0 of the format is used (Python/marshal.c: `TYPE_INT`, `TYPE_LONG`,
//! `TYPE_STRING`, `TYPE_UNICODE`, `TYPE_TUPLE`, `TYPE_DICT`, `TYPE_NONE`), so Pythons from 3.9 on read one file.

/// A value being written.
#[derive(Debug, Default)]
pub(super) struct Marshal(Vec<u8>);

impl Marshal {
    pub(super) fn finish(self) -> Vec<u8> {
        self.0
    }

    pub(super) fn int(&mut self, value: i64) -> &mut Self {
        if let Ok(small) = i32::try_from(value) {
            self.0.push(b'i');
            self.0.extend_from_slice(&small.to_le_bytes());
            return self;
        }
        // Digits of 15 bits, lowest first; their number has the sign.
        let mut digits = Vec::new();
        let mut rest = value.unsigned_abs();
        while rest > 0 {
            digits.push((rest & 0x7fff) as u16);
            rest >>= 15;
        }
        let count = digits.len() as i32;
        self.0.push(b'l');
        self.0.extend_from_slice(&(if value < 0 { -count } else { count }).to_le_bytes());
        digits.iter().for_each(|digit| self.0.extend_from_slice(&digit.to_le_bytes()));
        self
    }

    pub(super) fn text(&mut self, value: &str) -> &mut Self {
        self.sized(b'u', value.as_bytes())
    }

    pub(super) fn bytes(&mut self, value: &[u8]) -> &mut Self {
        self.sized(b's', value)
    }

    /// A tuple whose `count` items are written next.
    pub(super) fn tuple(&mut self, count: usize) -> &mut Self {
        self.0.push(b'(');
        self.length(count)
    }

    /// A dict: keys and values in turn are written next, then [`Marshal::end`].
    pub(super) fn dict(&mut self) -> &mut Self {
        self.0.push(b'{');
        self
    }

    /// The end of a dict.
    pub(super) fn end(&mut self) -> &mut Self {
        self.0.push(b'0');
        self
    }

    fn sized(&mut self, kind: u8, value: &[u8]) -> &mut Self {
        self.0.push(kind);
        self.length(value.len());
        self.0.extend_from_slice(value);
        self
    }

    /// Nothing here comes near 2 GiB: rows and names are bounded.
    fn length(&mut self, count: usize) -> &mut Self {
        self.0.extend_from_slice(&(count as u32).to_le_bytes());
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What `marshal.dumps(value, 2)` of CPython gives for the same values.
    #[test]
    fn values_are_written_as_cpython_writes_them() {
        let mut written = Marshal::default();
        written.dict().text("a").tuple(3).int(7).int(-1).int(1 << 51).text("b").bytes(b"\0x").end();
        let expected = b"{u\x01\0\0\0a(\x03\0\0\0i\x07\0\0\0i\xff\xff\xff\xffl\x04\0\0\0\0\0\0\0\0\0\x40\0u\x01\0\0\0bs\x02\0\0\0\0x0";
        assert_eq!(written.finish(), expected);
    }
}
