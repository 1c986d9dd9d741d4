//! Chance from a seed: the same on every machine and in every version.

/// A small generator (SplitMix64). Each part of a run has its own stream, so that a run with one mishap left
/// out stays as alike as it can.
#[derive(Clone, Debug)]
pub struct Rng(u64);

impl Rng {
    /// `stream` tells the parts of a run apart.
    pub fn new(seed: u64, stream: u64) -> Self {
        let mut rng = Rng(seed ^ stream.wrapping_mul(0x9e37_79b9_7f4a_7c15));
        rng.draw();
        rng
    }

    fn draw(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number in `0..n`; 0 if `n` is 0.
    pub fn below(&mut self, n: u64) -> u64 {
        if n == 0 { 0 } else { self.draw() % n }
    }

    /// A number in `from..=to`.
    pub fn between(&mut self, from: u64, to: u64) -> u64 {
        from + self.below(to - from + 1)
    }

    /// True in so many of a hundred cases.
    pub fn percent(&mut self, p: u64) -> bool {
        self.below(100) < p
    }

    pub fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len() as u64) as usize]
    }

    /// A rank in `0..n` of which low ones are likely (Zipf's law with exponent 1, nearly).
    pub fn zipf(&mut self, n: u64) -> u64 {
        let u = (self.draw() >> 11) as f64 / (1u64 << 53) as f64;
        ((n as f64).powf(u) as u64).saturating_sub(1).min(n - 1)
    }

    /// Of a magnitude between `from` and `to`, every magnitude being as likely as the others.
    pub fn scaled(&mut self, from: u64, to: u64) -> u64 {
        let u = (self.draw() >> 11) as f64 / (1u64 << 53) as f64;
        (from as f64 * (to as f64 / from as f64).powf(u)) as u64
    }
}
