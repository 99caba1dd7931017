from abreast._console import main

main()
