//! Each primitive beside published vectors.

use super::algorithms::{Cipher, IvGenerator, Mode};
use super::hash::{Hash, LONGEST};
use super::modes::{Ivs, sectors};
use super::sectors::SectorCipher;

fn bytes(hex: &str) -> Vec<u8> {
    let digit = |i: usize| u8::from_str_radix(&hex[i..i + 2], 16).unwrap();
    (0..hex.len()).step_by(2).map(digit).collect()
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[test]
fn hashes() {
    // RFC 1321, FIPS 180, the RIPEMD-160 page, GB/T 32905: "abc".
    for (hash, digest) in [
        (Hash::Md5, "900150983cd24fb0d6963f7d28e17f72"),
        (Hash::Sha1, "a9993e364706816aba3e25717850c26c9cd0d89d"),
        (Hash::Sha224, "23097d223405d8228642a477bda255b32aadbce4bda0b3f7e36c9da7"),
        (Hash::Sha256, "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"),
        (Hash::Ripemd160, "8eb208f7e05d987a9b044a8e98c6b087f15a0bfc"),
        (Hash::Sm3, "66c7f0f462eeedd9d1f2d46bdc10e4e24167c4875cf2f7a2297da02b8f4ba8e0"),
        (
            Hash::Sha384,
            "cb00753f45a35e8bb5a03d699ac65007272c32ab0eded1631a8b605a43ff5bed\
             8086072ba1e7cc2358baeca134c825a7",
        ),
        (
            Hash::Sha512,
            "ddaf35a193617abacc417349ae20413112e6fa4e89a97ea20a9eeee64b55d39a\
             2192992a274fc1a836ba3c23a3feebbd454d4423643ce80e2a9ac94fa54ca49f",
        ),
    ] {
        let mut out = [0; LONGEST];
        let length = hash.digest(&[b"a", b"", b"bc"], &mut out);
        assert_eq!(hex(&out[..length]), digest, "{}", hash.name());
        assert_eq!(hash.len(), length);
        assert_eq!(Hash::from_name(hash.name()), Some(hash));
    }
}

#[test]
fn pbkdf2() {
    // RFC 6070, and RFC 7914 (11) for SHA-256.
    let mut out = [0; 20];
    Hash::Sha1.pbkdf2(b"password", b"salt", 4096, &mut out);
    assert_eq!(hex(&out), "4b007901b765489abead49d926f721d065a429c1");
    let mut out = [0; 64];
    Hash::Sha256.pbkdf2(b"Password", b"NaCl", 80000, &mut out);
    assert_eq!(
        hex(&out),
        "4ddcd8f60b98be21830cee5ef22701f9641a4418d04c0414aeff08876b34ab56\
         a1d425a1225833549adb841b51c9b3176a272bdebba1d078478f62b397f33c8d"
    );
}

/// One block, padded to a sector by itself.
fn block(cipher: Cipher, mode: Mode, key: &str, iv: &str, plain: &str) -> String {
    let mut data = bytes(plain);
    let length = data.len();
    data.resize(512, 0);
    let mut ivs = [cipher::Block::<aes::Aes128>::default()];
    ivs[0].iter_mut().zip(bytes(iv)).for_each(|(to, from)| *to = from);
    let cipher = sectors(cipher, mode, &bytes(key)).unwrap();
    let ivs: &mut Ivs = &mut ivs;
    let before = ivs.to_vec();
    let whole = data.clone();
    cipher.encrypt(&mut data, ivs);
    let out = hex(&data[..length]);
    ivs.copy_from_slice(&before);
    cipher.decrypt(&mut data, ivs);
    assert_eq!(data, whole, "what was encrypted is decrypted again");
    out
}

#[test]
fn block_ciphers() {
    // FIPS 197 C, NESSIE and AES candidates' vectors, RFC 2144 B.
    let plain = "00112233445566778899aabbccddeeff";
    let key = "000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f";
    for (cipher, bytes, out) in [
        (Cipher::Aes128, 16, "69c4e0d86a7b0430d8cdb78070b4c55a"),
        (Cipher::Aes192, 24, "dda97ca4864cdfe06eaf70a0ec0d7191"),
        (Cipher::Aes256, 32, "8ea2b7ca516745bfeafc49904b496089"),
    ] {
        assert_eq!(block(cipher, Mode::Ecb, &key[..2 * bytes], "", plain), out);
    }
    let zero = "0".repeat(64);
    for (cipher, bytes, out) in [
        (Cipher::Twofish128, 16, "9f589f5cf6122c32b6bfec2f2ae8c35a"),
        (Cipher::Twofish192, 24, "efa71f788965bd4453f860178fc19101"),
        (Cipher::Twofish256, 32, "57ff739d4dc92c1bd7fc01700cc8216f"),
    ] {
        assert_eq!(block(cipher, Mode::Ecb, &zero[..2 * bytes], "", &zero[..32]), out);
    }
    let first_bit = format!("80{}", "0".repeat(62));
    for (cipher, bytes, out) in [
        (Cipher::Serpent128, 16, "264e5481eff42a4606abda06c0bfda3d"),
        (Cipher::Serpent192, 24, "9e274ead9b737bb21efcfca548602689"),
        (Cipher::Serpent256, 32, "a223aa1288463c0e2be38ebd825616c0"),
    ] {
        let made = block(cipher, Mode::Ecb, &first_bit[..2 * bytes], "", &zero[..32]);
        assert_eq!(made, out);
    }
    let cast = "0123456712345678234567893456789a";
    let out = block(Cipher::Cast5, Mode::Ecb, cast, "", "0123456789abcdef");
    assert_eq!(out, "238b4fe5847e44b2");
}

#[test]
fn modes() {
    // NIST SP 800-38A F.2.1, F.5.1; IEEE 1619 vector 4 (XTS-AES-128, sector 0).
    let key = "2b7e151628aed2a6abf7158809cf4f3c";
    let plain = "6bc1bee22e409f96e93d7e117393172aae2d8a571e03ac9c9eb76fac45af8e51";
    let iv = "000102030405060708090a0b0c0d0e0f";
    assert_eq!(
        block(Cipher::Aes128, Mode::Cbc, key, iv, plain),
        "7649abac8119b246cee98e9b12e9197d5086cb9b507219ee95db113a917678b2"
    );
    let counter = "f0f1f2f3f4f5f6f7f8f9fafbfcfdfeff";
    assert_eq!(
        block(Cipher::Aes128, Mode::Ctr, key, counter, plain),
        "874d6191b620e3261bef6864990db6ce9806f66b7970fdff8617187bb9fffdff"
    );
    let keys = "2718281828459045235360287471352631415926535897932384626433832795";
    let counting: String = (0..512).map(|n| format!("{:02x}", n as u8)).collect();
    let out = block(Cipher::Aes128, Mode::Xts, keys, "", &counting);
    assert_eq!(&out[..64], "27a7479befa1d476489f308cd4cfa6e2a96e4bbe3208ff25287dd3819616e89c");
    assert_eq!(&out[960..], "eb4a427d1923ce3ff262735779a418f20a282df920147beabe421ee5319d0568");
}

fn sectors_of(mode: Mode, ivs: IvGenerator, first: u64, count: usize) -> Vec<u8> {
    let keys = bytes(&"11".repeat(16 * mode.keys()));
    let cipher = SectorCipher::new(Cipher::Aes128, mode, ivs, &keys).unwrap();
    let mut data = vec![0; count * 512];
    cipher.encrypt(&mut data, first);
    let encrypted = data.clone();
    cipher.decrypt(&mut data, first);
    assert!(data.iter().all(|byte| *byte == 0));
    encrypted
}

#[test]
fn many_sectors_are_encrypted_as_one_by_one() {
    let first = (1 << 32) - 20;
    for mode in [Mode::Ecb, Mode::Cbc, Mode::Ctr, Mode::Xts] {
        for ivs in [IvGenerator::Plain, IvGenerator::Plain64, IvGenerator::Essiv(Hash::Md5)] {
            let together = sectors_of(mode, ivs, first, 75);
            for (n, sector) in (0..).zip(together.chunks(512)) {
                assert!(sector == sectors_of(mode, ivs, first + n, 1), "{mode:?} {ivs:?} {n}");
            }
        }
    }
}

#[test]
fn the_number_of_a_sector_is_its_iv() {
    let of = |ivs, first| sectors_of(Mode::Xts, ivs, first, 1);
    let (plain, plain64) = (IvGenerator::Plain, IvGenerator::Plain64);
    assert_eq!(of(plain, 5), of(plain64, 5));
    assert_eq!(of(plain, 1 << 32), of(plain64, 0), "the low 32 bits only");
    assert_ne!(of(plain64, 1 << 32), of(plain64, 0));
    assert_ne!(of(IvGenerator::Essiv(Hash::Sha256), 5), of(plain64, 5));
}
