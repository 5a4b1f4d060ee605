//! Any bytes as a LUKS header: it is refused, or read and written as the same; and its
//! slots are tried, where that takes few iterations, with what follows as material.
#![no_main]

use libfuzzer_sys::fuzz_target;
use qcow2rs::Secret;
use qcow2rs::hot::LuksHeader;
use qcow2rs_fuzz::memory::peak;

fuzz_target!(|data: &[u8]| {
    let (header, used) = peak(|| LuksHeader::parse(data));
    assert!(used < 64 << 10, "{used} bytes for a header");
    let Ok(header) = header else { return };
    let again = LuksHeader::parse(&header.to_bytes()).expect("our own header");
    assert!(again == header);
    let secret = Secret::new(b"passphrase").expect("there is memory");
    for slot in 0..9 {
        let empty = header.without_key(slot);
        assert!(
            LuksHeader::parse(&empty.to_bytes()).is_ok_and(|it| it.active() <= header.active())
        );
        if header.cost(slot) > 4 {
            continue;
        }
        let mut material = data.to_vec();
        material.resize(header.material_bytes(), 0);
        let (key, used) = peak(|| header.unlock(slot, &secret, &mut material.into()));
        assert!(key.is_ok() && used < 2 << 20, "{used} bytes for a key");
    }
});
