//! Buffers that go along with requests and come back.

use std::sync::Arc;

use qcow2rs::{Buffer, Image, OpenOptions, Source, WriteFlags};

use crate::support::qemu_create;
use crate::{engines, one, queue};

/// O_DIRECT takes aligned buffers as they are, and others by way of a copy; either way
/// the very buffer comes back that was given.
#[test]
fn direct_requests_take_any_buffer_and_hand_it_back() {
    let directory = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let path = directory.path().join("image");
    qemu_create(&path, "extended_l2=on", 1 << 20);
    let mut options = OpenOptions::new().writable(true);
    options.direct = true;
    for engine in engines() {
        let image = Arc::new(Image::open(Source::path(&path), &options).unwrap());
        let queue = queue(&image, engine, 4);
        let aligned = || Buffer::aligned(8192).unwrap();
        let kinds: [fn() -> Buffer; 2] =
            [|| Buffer::aligned(8192).unwrap(), || vec![0; 8192].into()];
        for (number, kind) in kinds.into_iter().enumerate() {
            let mut buffer = kind();
            buffer.fill(0x50 + number as u8);
            let address = buffer.as_ptr();
            queue.write(buffer, 4096, WriteFlags::default(), 1).unwrap();
            let back = one(&queue);
            back.result.unwrap();
            assert_eq!(back.buffer.unwrap().as_ptr(), address);
            for mut to in [aligned(), kind()] {
                to.fill(0xff);
                let address = to.as_ptr();
                queue.read(to, 4096, 2).unwrap();
                let back = one(&queue);
                back.result.unwrap();
                let buffer = back.buffer.unwrap();
                assert_eq!(buffer.as_ptr(), address);
                assert_eq!(buffer, [0x50 + number as u8; 8192]);
            }
        }
        drop(queue);
        image.close().unwrap();
    }
}
