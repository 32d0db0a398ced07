"""Private data: what is found, what only looks like it, a second pass that finds nothing, and adversarial texts."""

import random
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from groundup.corpus.quality.privacy import Replacement, replace_private

ALL = ("email", "phone", "ip", "credit_card")
HOSTILE_SECONDS = 5.0


def replaced(text: str) -> str:
    return replace_private(text, ALL)[0]


@pytest.mark.parametrize(
    "address",
    [
        "jane.doe@example.org", "J_D+tag%x@mail.example.co.uk", "o'neill@example.ie", "x@a-b.museum", "josé@correo.es",
        "42@numbers.io", "a@xn--bcher-kva.example",
    ],
)  # fmt: skip
@pytest.mark.parametrize("frame", ["{}", "Write to {}.", "<a href='mailto:{}'>", "联系{}。", "({}), or ring", "a;{};b"])
def test_email_addresses_are_replaced(address: str, frame: str) -> None:
    assert replaced(frame.format(address)) == frame.format("<EMAIL>")


@pytest.mark.parametrize(
    "text",
    ["logo@2x.png", "lodash@4.17.21", "@app.route('/')", "meet @ noon. Then", "a@b", "x @ y.org", "@handle.bsky"],
)
def test_an_at_sign_alone_is_no_address(text: str) -> None:
    assert replaced(text) == text


@pytest.mark.parametrize(
    "number",
    [
        "(212) 555-0123", "212-555-0123", "212.555.0123", "1-212-555-0123", "+1 (212) 555-0123", "+12125550123",
        "+44 20 7946 0958", "+49 (0)30 901820", "+33 1 23 45 67 89", "01 23 45 67 89", "020 7946 0958", "07700 900123",
        "(030) 901820", "+86 138-1234-5678",
    ],
)  # fmt: skip
@pytest.mark.parametrize("frame", ["{}", "Ring {}.", "tel:{}", "a fax ({}), or", "{}\n{}", "電話{}に"])
def test_phone_numbers_are_replaced(number: str, frame: str) -> None:
    assert replaced(frame.format(number, number)) == frame.format("<PHONE>", "<PHONE>")


@pytest.mark.parametrize(
    "number", ["2831823829", "(283)-182-3829", "(283) 182 3829", "283-182-3829", "555 0123", "030/901820"]
)
def test_with_a_label_other_digits_are_phone_numbers_too(number: str) -> None:
    assert replaced(f"Feel free to contact me at {number} if you like.") == (
        "Feel free to contact me at <PHONE> if you like."
    )
    assert replaced(f"Phone: {number}") == "Phone: <PHONE>"


@pytest.mark.parametrize(
    "text",
    [
        "ISBN 978-3-16-148410-0", "ISBN 0-306-40615-2", "ISBN: 0306406152", "ISSN 2049-3630", "on 2024-03-04 12:30:45",
        "call on 2024-03-04", "from 04.03.2024 to 31.12.2024", "1998-2004", "pages 1234567-1234589",
        "1650000000", "12345678901234567890", "3.14159265358979", "1,234,567,890", "$2 000 000 000", "id=2125550123",
        "doi:10.1038/212.555.0123", "https://example.org/212-555-0123/x", "a1-212-555-0123-9", "0x12345678",
        "192-168-1-1", "10 000 000", "555-0123", "1 + 23456789", "lines 100-200-3000",
    ],
)  # fmt: skip
def test_other_numbers_are_no_phones(text: str) -> None:
    assert replace_private(text, ["phone"]) == (text, [])


@pytest.mark.parametrize(
    "address",
    ["203.0.114.7", "151.101.1.140", "8.8.178.8", "99.255.1.1", "2001:4860:4860::8888", "2a00:1450:4001:0:1:2:3:4"],
)
@pytest.mark.parametrize("frame", ["{}", "from {}.", "[{}]", "the host {}, which", "ssh root@ {} now", "『{}』"])
def test_public_addresses_are_replaced(address: str, frame: str) -> None:
    assert replaced(frame.format(address)) == frame.format("<IP>")


@pytest.mark.parametrize(
    "text", ["ping 8.8.8.8", "IP: 5.6.7.8", "http://5.6.7.8/x", "5.6.7.8:8080", "5.6.7.8/24 or so"]
)
def test_small_numbers_are_addresses_where_the_text_says_so(text: str) -> None:
    found = replaced(text)
    assert found.count("<IP>") == 1
    assert "6.7" not in found
    assert "8.8.8" not in found


@pytest.mark.parametrize(
    "text",
    [
        "Windows 6.1.0.0", "version 6.1.0.120", "1.3.6.1.5.5", "1.3.6.1", "OID 1.2.840.113556.1.4.803",
        "113556.1.4.803", "Section 6.3.2.3", "§ 6.3.2.130", "6.3.2.3 Scope of this clause", "v1.2.3.104",
        "V8 11.8.17.17", "patch V8 to 11.8.172.17", "libfoo-1.2.3.104", "Chrome/120.0.6099.109", "10.0.17763.1",
        "Table 4.1.2.101", "upgrade from driver 22.101.4.2 or older", "1.2.3.4.105", "256.1.1.1", "01.102.3.4",
        "1.2.3.104-rc1",
    ],
)  # fmt: skip
def test_versions_sections_and_object_identifiers_are_no_addresses(text: str) -> None:
    assert replace_private(text, ["ip"]) == (text, [])


@pytest.mark.parametrize(
    "address",
    [
        "10.20.130.40", "192.168.178.20", "172.16.200.1", "127.0.0.1", "169.254.169.254", "224.100.0.1",
        "255.255.255.255", "203.0.113.7", "198.51.100.0", "151.101.1.0", "fe80::1", "::1", "2001:db8::1",
        "fd00:1234::1", "2021:03:04",
    ],
)  # fmt: skip
def test_addresses_that_reach_nobody_stay(address: str) -> None:
    text = f"the server {address} answers"
    assert replace_private(text, ["ip"]) == (text, [])


@pytest.mark.parametrize(
    "number",
    [
        "4111111111111111", "4111 1111 1111 1111", "4111-1111-1111-1111", "5555555555554444", "2223003122003222",
        "378282246310005", "3782 822463 10005", "6011111111111117", "3530111333300000", "30569309025904",
        "6200000000000005",
    ],
)  # fmt: skip
def test_credit_cards_are_replaced(number: str) -> None:
    assert replaced(f"card {number}, valid") == "card <CREDIT_CARD>, valid"
    assert replaced(f'"{number}"') == '"<CREDIT_CARD>"'


@pytest.mark.parametrize(
    "number",
    [
        "4111111111111112", "9111111111111111", "41111111111111111", "4111 1111-1111 1111", "41 1111 1111 1111 11",
        "x4111111111111111", "3.4111111111111111", "0.4111111111111111", "9780306406157", "1-4111111111111111",
    ],
)  # fmt: skip
def test_other_long_numbers_are_no_cards(number: str) -> None:
    assert replace_private(f"number {number}.", ["credit_card"]) == (f"number {number}.", [])


def test_nearly_all_random_numbers_are_no_cards() -> None:
    numbers = [str(value) for value in random.Random(1).sample(range(10**15, 10**16), 3000)]
    n_found = sum(bool(replace_private(number, ["credit_card"])[1]) for number in numbers)
    assert n_found < 0.04 * len(numbers)  # a tenth passes Luhn, a quarter of these begins like an issuer's


def test_only_what_is_asked_for_is_replaced_and_findings_show_their_surroundings() -> None:
    text = "Ask Jane at jane@example.org or at\n+1 (212) 555-0123 before noon."
    assert replace_private(text, []) == (text, [])
    assert replace_private(text, ["phone"])[0] == "Ask Jane at jane@example.org or at\n<PHONE> before noon."
    changed, findings = replace_private(text, ["phone", "email"])
    assert changed == "Ask Jane at <EMAIL> or at\n<PHONE> before noon."
    assert findings == [
        Replacement("email", "jane@example.org", "Ask Jane at jane@example.org or at +1 (212) 555-0123 befor"),
        Replacement("phone", "+1 (212) 555-0123", "Ask Jane at <EMAIL> or at +1 (212) 555-0123 before noon."),
    ]


def test_placeholders_are_no_control_tokens() -> None:
    assert "<|" not in replaced("a@example.org 212-555-0123 151.101.1.140 4111111111111111")


FRAGMENTS = st.sampled_from(
    [
        "a@b.com", "jane.doe@example.org", "8.8.178.8", "1.2.3.4", "212-555-0123", "(212) 555-0123", "+44 20 7946 0958",
        "4111111111111111", "4111 1111 1111 1111", "2831823829", "2001:4860::8888", "<EMAIL>", "<PHONE>", "<IP>",
        "version", "call", "ip", "tel", "update", " ", ".", "-", ":", "/", "+", "(", ")", "1", "07", "@", "x", "\n",
        "_", "é",
    ]
)  # fmt: skip


@given(st.lists(FRAGMENTS, max_size=14).map("".join), st.sets(st.sampled_from(ALL)).map(sorted))
def test_a_second_pass_finds_nothing(text: str, kinds: list[str]) -> None:
    once, _ = replace_private(text, kinds)
    assert replace_private(once, kinds) == (once, [])


@given(st.text(alphabet="ab@.:-+()/ 0123456789\nv<>", max_size=120))
def test_findings_account_for_every_change(text: str) -> None:
    once, findings = replace_private(text, ALL)
    assert replace_private(once, ALL) == (once, [])
    n_placed = sum(once.count(mark) for mark in ("<EMAIL>", "<PHONE>", "<IP>", "<CREDIT_CARD>"))
    assert len(once) - len(text) == sum(len(f"<{item.kind.upper()}>") - len(item.found) for item in findings)
    assert n_placed == len(findings)
    assert all(item.found for item in findings)


@pytest.mark.parametrize(
    "piece",
    [
        "1", "1 ", "1-", "1.", "1.1.1.1", "(", "+", "+1", "+1 (", "((((1", "0 1 ", "4111 ", "2:", "2001:", "@", "a@",
        "a@a.",
        "a" * 63 + " @a.co", "@" + "a-" * 40, "tel ", "call 1 ", "(212) ", "é@a.co", "2 ", "07 ", "12.34.", "tel(",
        "update ",
    ],
)  # fmt: skip
def test_adversarial_megabytes_take_linear_time(piece: str) -> None:
    text = (piece * (2**18 // len(piece) + 1))[: 2**18]
    start = time.process_time()
    replace_private(text, ALL)
    assert time.process_time() - start < HOSTILE_SECONDS / 4


def test_an_adversarial_megabyte_on_one_line_ends() -> None:
    text = "".join(random.Random(7).choices("0123456789.-:@+() a", k=2**20))
    start = time.process_time()
    replace_private(text, ALL)
    assert time.process_time() - start < HOSTILE_SECONDS
