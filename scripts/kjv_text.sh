#!/usr/bin/env bash
# Writes the King James Bible as plain text, from Debian's package bible-kjv-text: 1189 chapters, each a document.
#   scripts/kjv_text.sh OUTPUT [BIBLE_DATA]
# The package holds 68 frames of compress(1) data without their three magic bytes, behind a header: big-endian at byte 0x58 the
# number of frames, from 0x5c on the offset of each. Unpacked, they are lines like "Ge1:1 In the beginning ...".
set -euo pipefail

if [ "$#" -lt 1 ]; then
    echo "usage: kjv_text.sh OUTPUT [BIBLE_DATA]" >&2
    exit 2
fi
output=$1
data=${2:-/usr/lib/bible.data}
if [ ! -r "$data" ]; then
    echo "kjv_text.sh: $data is missing; it comes with Debian's package bible-kjv-text" >&2
    exit 1
fi
if [ "$(head -c 4 "$data")" != EC02 ]; then
    echo "kjv_text.sh: $data does not look like the package's data file" >&2
    exit 1
fi

big_endian_words() { od -An -v -tu1 -j "$1" -N "$((4 * $2))" -w4 "$data" | awk '{print (($1 * 256 + $2) * 256 + $3) * 256 + $4}'; }

frames=$(big_endian_words 88 1)
mapfile -t begins < <(big_endian_words 92 "$frames")
begins+=("$(stat -Lc %s "$data")")

unpack() {
    local i
    for ((i = 0; i < frames; ++i)); do
        { printf '\037\235\220'; head -c "${begins[i + 1]}" "$data" | tail -c "$((begins[i + 1] - begins[i]))"; } | gzip -dc
    done
}

books="Ge=Genesis Exo=Exodus Lev=Leviticus Num=Numbers Deu=Deuteronomy Josh=Joshua Jdgs=Judges Ruth=Ruth 1Sm=1_Samuel 2Sm=2_Samuel
1Ki=1_Kings 2Ki=2_Kings 1Chr=1_Chronicles 2Chr=2_Chronicles Ezra=Ezra Neh=Nehemiah Est=Esther Job=Job Psa=Psalms Prv=Proverbs
Eccl=Ecclesiastes SSol=Song_of_Solomon Isa=Isaiah Jer=Jeremiah Lam=Lamentations Eze=Ezekiel Dan=Daniel Hos=Hosea Joel=Joel
Amos=Amos Obad=Obadiah Jonah=Jonah Mic=Micah Nahum=Nahum Hab=Habakkuk Zep=Zephaniah Hag=Haggai Zec=Zechariah Mal=Malachi
Mat=Matthew Mark=Mark Luke=Luke John=John Acts=Acts Rom=Romans 1Cor=1_Corinthians 2Cor=2_Corinthians Gal=Galatians
Eph=Ephesians Phi=Philippians Col=Colossians 1Th=1_Thessalonians 2Th=2_Thessalonians 1Tim=1_Timothy 2Tim=2_Timothy Titus=Titus
Phmn=Philemon Heb=Hebrews Jas=James 1Pet=1_Peter 2Pet=2_Peter 1Jn=1_John 2Jn=2_John 3Jn=3_John Jude=Jude Rev=Revelation"

mkdir -p "$(dirname "$output")"
temporary=$(mktemp "$output.XXXXXX")
trap 'rm -f "$temporary"' EXIT
# The end of a frame may cut a verse; the first line is the package's title.
unpack | awk -v books="$books" '
    BEGIN {
        count = split(books, pairs)
        for (i = 1; i <= count; ++i) { split(pairs[i], pair, "="); gsub("_", " ", pair[2]); name[pair[1]] = pair[2] }
    }
    match($0, /^[1-3]?[A-Za-z]+[0-9]+:[0-9]+ /) {
        reference = substr($0, 1, RLENGTH - 1)
        verse = reference; sub(/.*:/, "", verse)
        chapter = reference; sub(/:.*/, "", chapter); sub(/.*[A-Za-z]/, "", chapter)
        book = reference; sub(/[0-9]+:[0-9]+$/, "", book)
        if (!(book in name)) { print "kjv_text.sh: unknown book " book > "/dev/stderr"; exit 1 }
        if (book != last_book || chapter != last_chapter) {
            if (last_book != "") print "<|endoftext|>"
            print name[book] " " chapter "\n"
            last_book = book; last_chapter = chapter; ++chapters
        }
        print verse " " substr($0, RLENGTH + 1)
        ++verses
    }
    END { if (chapters != 1189 || verses != 31102) { print "kjv_text.sh: got " chapters " chapters and " verses " verses, expected 1189 and 31102" > "/dev/stderr"; exit 1 } }
' >"$temporary"
chmod 644 "$temporary"
mv "$temporary" "$output"
