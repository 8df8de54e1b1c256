/* Entry of the PV guest: 64-bit, paging on, %rsi = start_info. */
#include "notes.h"

NOTE(NOTE_GUEST_OS, .asciz, "xtool-tiny")
NOTE(NOTE_XEN_VERSION, .asciz, "xen-3.0")
NOTE(NOTE_LOADER, .asciz, "generic")
NOTE(NOTE_VIRT_BASE, .quad, VIRT_BASE)
NOTE(NOTE_PADDR_OFFSET, .quad, 0)
NOTE(NOTE_ENTRY, .quad, _start)
NOTE(NOTE_HYPERCALL_PAGE, .quad, hypercall_page)
NOTE(NOTE_FEATURES, .asciz, "!writable_page_tables|pae_pgdir_above_4gb")

    .text
    .globl _start, hypercall, hypercall_page
_start:
    cld
    lea stack_end(%rip), %rsp
    xor %ebp, %ebp
    mov %rsi, %rdi
    call pv_main
    ud2

/* long hypercall(number, a, b, c, d): Xen fills the page with one 32-byte stub per number. */
hypercall:
    mov %edi, %eax
    mov %rsi, %rdi
    mov %rdx, %rsi
    mov %rcx, %rdx
    mov %r8, %r10
    shl $5, %eax
    lea hypercall_page(%rip), %rcx
    add %rcx, %rax
    jmp *%rax

    .bss
    .balign 4096
hypercall_page:
    .skip 4096
    .skip 8192
stack_end:

    .section .note.GNU-stack, "", @progbits
