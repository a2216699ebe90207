//! Random numbers of an image, from Philox4x32-10 (Salmon, Moraes, Dror and Shaw 2011): the counter's first half is the
//! position in the image's stream, the second the number of the image.

/// The key of a corruption at a severity: a mix of its name (FNV-1a) with both numbers.
pub fn key(seed: u64, name: &str, severity: usize) -> u64 {
    let hash = |sum: u64, byte: u8| (sum ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
    let start = 0xcbf2_9ce4_8422_2325;
    let number = seed.to_le_bytes();
    name.bytes().chain(number).chain([severity as u8]).fold(start, hash)
}

/// The stream of one image.
pub struct Draws {
    key: u64,
    image: u64,
    position: u64,
    words: [u32; 4],
    used: usize,
}

impl Draws {
    pub fn new(key: u64, image: u64) -> Self {
        Self { key, image, position: 0, words: [0; 4], used: 4 }
    }

    fn word(&mut self) -> u32 {
        if self.used == 4 {
            self.words = philox(self.position, self.image, self.key);
            self.position += 1;
            self.used = 0;
        }
        self.used += 1;
        self.words[self.used - 1]
    }

    /// Uniform in [0, 1): 53 bits of two words.
    pub fn uniform(&mut self) -> f64 {
        let (high, low) = (u64::from(self.word()) >> 5, u64::from(self.word()) >> 6);
        ((high << 26 | low) as f64) / (1u64 << 53) as f64
    }

    /// Uniform between two numbers.
    pub fn between(&mut self, low: f64, high: f64) -> f64 {
        low + (high - low) * self.uniform()
    }

    /// Standard normal, by Box and Muller's transform; the second number of the pair is not used.
    pub fn normal(&mut self) -> f64 {
        let radius = (-2.0 * (1.0 - self.uniform()).ln()).sqrt();
        radius * (std::f64::consts::TAU * self.uniform()).cos()
    }
}

fn philox(position: u64, image: u64, key: u64) -> [u32; 4] {
    let mut c = [position as u32, (position >> 32) as u32, image as u32, (image >> 32) as u32];
    let mut k = [key as u32, (key >> 32) as u32];
    for _ in 0..10 {
        let (a, b) = (0xD251_1F53 * u64::from(c[0]), 0xCD9E_8D57 * u64::from(c[2]));
        c = [(b >> 32) as u32 ^ c[1] ^ k[0], b as u32, (a >> 32) as u32 ^ c[3] ^ k[1], a as u32];
        k = [k[0].wrapping_add(0x9E37_79B9), k[1].wrapping_add(0xBB67_AE85)];
    }
    c
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The published answers for zeros and for ones.
    #[test]
    fn philox_known_answers() {
        assert_eq!(philox(0, 0, 0), [0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8]);
        assert_eq!(philox(u64::MAX, u64::MAX, u64::MAX), [0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd]);
    }
}
