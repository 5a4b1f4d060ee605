//! Any bytes to each parser. What is understood can be written, and is then
//! understood as the same. The last byte chooses the parser.
#![no_main]

use libfuzzer_sys::fuzz_target;
use qcow2rs::format::bitmap::{self, BitmapCluster};
use qcow2rs::format::compressed;
use qcow2rs::format::compression::{Compression, Context};
use qcow2rs::format::header::Header;
use qcow2rs::format::l2::{L2Entry, L2Format};
use qcow2rs::format::snapshot;
use qcow2rs::geometry::Geometry;
use qcow2rs_fuzz::memory::peak;

fn word(bytes: &[u8], index: usize) -> u64 {
    let mut word = [0; 8];
    let from = bytes.len().min(index * 8);
    let there = &bytes[from..bytes.len().min(from + 8)];
    word[..there.len()].copy_from_slice(there);
    u64::from_be_bytes(word)
}

fn header(bytes: &[u8]) {
    let _ = Header::parse_for_check(bytes);
    let _ = Header::bytes_wanted(bytes);
    let Ok(header) = Header::parse(bytes) else { return };
    let _ = (header.unsupported(true), header.unknown_autoclear(), header.extra_bytes());
    let _ = (header.l1_entries_needed(), header.virtual_size(), header.check_snapshot_table());
    if let Ok(written) = header.to_bytes() {
        // Written in our own order, and from then on the same.
        let again = Header::parse(&written).expect("our own header");
        assert!(again.to_bytes().expect("it was written before") == written);
    }
}

fn snapshots(bytes: &[u8]) {
    let count = word(bytes, 0) as u32 % 70_000;
    let Ok((list, end)) = snapshot::parse_table(bytes, count) else { return };
    assert!(end <= bytes.len() && list.len() == count as usize);
    if let Ok(written) = snapshot::encode_table(&list, 1 << 20) {
        let (again, _) = snapshot::parse_table(&written, count).expect("our own table");
        assert_eq!(again.len(), list.len());
    }
}

fn bitmaps(bytes: &[u8]) {
    let count = word(bytes, 0) as u32 % 70_000;
    let Ok(list) = bitmap::parse_directory(bytes, count) else { return };
    for entry in &list {
        let _ = entry.check(geometry(bytes), word(bytes, 2));
    }
    if let Ok(written) = bitmap::encode_directory(&list) {
        assert_eq!(bitmap::parse_directory(&written, count).expect("our own directory"), list);
    }
}

fn geometry(bytes: &[u8]) -> Geometry {
    let first = bytes.first().copied().unwrap_or(0);
    let extended_l2 = first & 1 != 0;
    let lowest = if extended_l2 { 14 } else { 9 };
    let cluster_bits = lowest + u32::from(first >> 1) % (22 - lowest);
    Geometry { cluster_bits, extended_l2 }
}

fn entries(bytes: &[u8]) {
    let geometry = geometry(bytes);
    for version in [2, 3] {
        let format = L2Format { geometry, version, data_file: false };
        for index in 0..bytes.len() / 16 {
            let (descriptor, bitmap) = (word(bytes, index * 2), word(bytes, index * 2 + 1));
            let _ = BitmapCluster::decode(descriptor, geometry);
            let _ = compressed::place(descriptor, geometry).host_clusters(geometry);
            let Ok(cluster) = format.decode(L2Entry { descriptor, bitmap }) else { continue };
            for from in 0..geometry.subclusters() {
                let (kind, run) = cluster.run(from, geometry.subclusters());
                assert!(run > 0 && from + run <= geometry.subclusters());
                assert_eq!(kind, cluster.subcluster(from));
            }
            let again = format.decode(format.encode(cluster)).expect("our own entry");
            assert_eq!(again, cluster);
        }
    }
}

/// The size says how large the cluster is, and which method comes first: what one of
/// them has made of the bytes, the other compresses, too.
fn streams(bytes: &[u8]) {
    let Some((size, stream)) = bytes.split_first() else { return };
    let mut output = vec![0; 512 << (size % 8)];
    let expected = output.len() as u64;
    let method = if size & 8 == 0 { Compression::Zlib } else { Compression::Zstd };
    let (done, held) = peak(|| method.decompress(&mut Context::default(), stream, &mut output));
    assert!(held < expected + (256 << 10), "{held} bytes to decompress {expected}");
    if done.is_err() {
        return;
    }
    for method in [Compression::Zlib, Compression::Zstd] {
        let mut packed = vec![0; output.len()];
        if let Some(length) = method.compress(&output, &mut packed).expect("memory") {
            let mut again = vec![1; output.len()];
            method
                .decompress(&mut Context::default(), &packed[..length], &mut again)
                .expect("our own stream");
            assert!(again == output);
        }
    }
}

fuzz_target!(|data: &[u8]| {
    let Some((which, bytes)) = data.split_last() else { return };
    match which % 5 {
        0 => header(bytes),
        1 => snapshots(bytes),
        2 => bitmaps(bytes),
        3 => entries(bytes),
        _ => streams(bytes),
    }
});
