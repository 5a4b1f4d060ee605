//! The stride pattern of `qemu-img bench`: request i is at i * step, modulo the
//! size of the disk. Knows nothing of who carries the requests out.

/// Bytes of a request.
pub const REQUEST: u64 = 4096;

/// Where the requests of a run go.
#[derive(Clone, Copy)]
pub struct Pattern {
    pub size: u64,
    pub step: u64,
    pub count: u64,
}

impl Pattern {
    /// Scatters `count` requests over a disk of `size` bytes, a power of two: each
    /// step is some clusters and one request, so that no offset is met twice before
    /// all have been (the step in requests is odd, hence coprime with their number).
    ///
    /// Of the first few steps that do so, the one is taken that meets most clusters:
    /// an allocating run is to allocate clusters, not to fill up those it has.
    pub fn scattered(size: u64, cluster: u64, count: u64) -> Pattern {
        assert!(size.is_power_of_two() && cluster.is_power_of_two() && count <= size / REQUEST);
        let candidates = (3..64).map(|k| Pattern { size, step: k * cluster + REQUEST, count });
        candidates.max_by_key(|pattern| pattern.clusters(cluster)).expect("there are candidates")
    }

    /// How many different clusters are met.
    pub fn clusters(&self, cluster: u64) -> u64 {
        let mut met = vec![false; usize::try_from(self.size / cluster).expect("fits")];
        self.offsets().for_each(|offset| met[(offset / cluster) as usize] = true);
        met.iter().filter(|met| **met).count() as u64
    }

    /// The offsets, in order.
    pub fn offsets(&self) -> impl Iterator<Item = u64> + use<> {
        self.share(0, 1)
    }

    /// The offsets that are thread `index`'s when `threads` take turns.
    pub fn share(&self, index: u64, threads: u64) -> impl Iterator<Item = u64> + use<> {
        let size = self.size;
        let stride = self.step * threads % size;
        let mut next = self.step * index % size;
        (index..self.count).step_by(threads as usize).map(move |_| {
            let offset = next;
            next += stride;
            if next >= size {
                next -= size;
            }
            offset
        })
    }
}
